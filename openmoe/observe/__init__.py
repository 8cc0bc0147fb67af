"""What a run writes down and shows: metrics, display, pictures, records."""
