"""What a delegate's runtime is known to do right: consulted when partitioning, and again on the serialised result."""
