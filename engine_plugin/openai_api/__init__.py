"""What engines share of OpenAI's API: bodies, conversations, pictures, rankings, answers assembled from streams."""
