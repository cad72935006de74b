"""Other people's writers, run on models of true size without weights, to see what names and shapes they write."""
