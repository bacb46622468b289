"""`anywire demo`: one program over every wire, the promises kept before your eyes, and nothing left behind."""
