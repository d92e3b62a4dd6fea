"""The tests, folder by folder as the package; ``support`` holds what they share."""
