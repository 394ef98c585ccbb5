"""Qualcomm QNN: the NPU (HTP) of Snapdragon chips."""
