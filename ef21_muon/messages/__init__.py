"""What a message is: what of a matrix is kept, how numbers are written, what is remembered."""
