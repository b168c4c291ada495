"""The Ray cluster itself: connecting, checking nodes, freeing what dead runs hold."""
