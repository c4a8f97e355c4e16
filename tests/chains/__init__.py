"""Random chains of images, and long work on them: the guest's view before, after, and at every death in between."""
