"""What cnnray is measured against, side by side: see README.md in this folder."""
