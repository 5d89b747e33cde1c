"""A store as one HTML file. The import rule: reporting reads the store and knows neither preprocess nor adapters."""
