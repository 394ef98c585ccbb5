"""The `mobizo` command: a thin layer over the compiler, the lowering stage and the driver."""
