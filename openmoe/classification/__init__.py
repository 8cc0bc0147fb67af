"""Classifying texts: records, training of models.classifier, probabilities and scores."""
