"""A web page that makes videos: models that stay in memory, requests that can be stopped, and the page itself."""
