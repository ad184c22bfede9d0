"""The console: `live` holds what it shows, `pages` serves it, `static` is the page itself."""
