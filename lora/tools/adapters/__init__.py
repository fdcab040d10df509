"""Adapter files for the tools: read in any layout, written in any layout."""
