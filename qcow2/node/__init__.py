"""What can be read and written like a disk: chains of images, what is where in them."""
