"""Vulkan: GPUs of phones and desktops."""

NAME = "vulkan"
#: The name under which the delegate registers itself with ExecuTorch's runtime.
BACKEND = "VulkanBackend"
