"""What a job needs around the drawing: pictures in, pictures out, progress."""
