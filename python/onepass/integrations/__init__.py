"""What onepass knows of other libraries."""
