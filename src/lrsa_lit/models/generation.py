"""How answers are decoded, wherever this project generates."""

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Plain greedy decoding, whatever the model's own generation_config.json says."""
