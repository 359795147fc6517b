"""What is looked at from outside: texts, their loops, and weights."""
