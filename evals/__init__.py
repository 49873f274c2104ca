"""Generates videos with trained models, scores them with VBench, measures drift, prints tables."""
