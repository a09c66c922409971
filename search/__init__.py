"""nas-compressor's room for the torch-free search: space, objectives, predictors, algorithms, evaluation store."""
