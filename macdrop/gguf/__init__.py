"""GGUF files (llama.cpp's format) as base models: checked, then written once as a folder of safetensors."""
