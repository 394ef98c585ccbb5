"""Other ways to read a program than its printed form: differences, blocks, pictures, networkx."""
