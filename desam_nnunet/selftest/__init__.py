"""A minute or two of real work on a device, compared with the same in float32 on the CPU."""
