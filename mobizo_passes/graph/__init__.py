"""The graph under rewriting: its editor, our operators, inference of values, FLOPs, the printed form."""
