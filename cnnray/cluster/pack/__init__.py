"""The pack job."""
