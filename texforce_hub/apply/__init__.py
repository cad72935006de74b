"""An adapter on a model: does it fit, where does each layer go, put it on, take it off bit for bit."""
