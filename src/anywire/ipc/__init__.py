"""What the wires need of the operating system: descriptors in flight, FIFOs."""
