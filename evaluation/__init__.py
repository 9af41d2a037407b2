"""Metrics of retrieval with long text."""
