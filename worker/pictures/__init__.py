"""What comes with a job and what goes out: pictures read, framed and stored, and the text inside of them."""
