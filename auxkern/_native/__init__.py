"""Where the build puts the native library; nothing to import."""
