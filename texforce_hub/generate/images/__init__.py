"""Pictures of results: contact sheets, curves, heat maps, and the text that PNG files carry."""
