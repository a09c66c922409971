"""The gguf layout: one file for llama.cpp, and llama.cpp itself, which proves it."""
