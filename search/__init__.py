"""nas-compressor's torch-free search: space, objectives, predictors, algorithms, evaluation store."""
