"""Which low-rank updates a graph has, which of them are trained, and how PEFT saves them."""
