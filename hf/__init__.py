"""Hugging Face folders: Llama's weights, and ours for transformers, in and out."""
