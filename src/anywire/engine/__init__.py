"""What the kernel says happened: demultiplexers, timers, wakeups, and a reactor over them. Usable on its own."""
