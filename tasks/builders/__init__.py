"""TFDS builders of data sets nobody publishes prepared; scripts/build_datasets.sh runs them."""
