"""Takes what README and docs print out of the pages, runs it, and compares what comes out."""
