"""What every other part may use: errors, files, prompts, pictures, seeds."""
