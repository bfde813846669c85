"""What the compiler generates, read: its intermediate text, PTX, and what threads of a program share in them."""
