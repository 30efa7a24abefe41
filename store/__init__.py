"""What lies on the disk and what is told of it: downloads, data sets beyond the book's, whole files, output."""
