"""Hugging Face folders: Llama's weights in, and our models out for transformers and in again."""
