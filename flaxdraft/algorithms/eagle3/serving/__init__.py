"""What serving engines ask of an EAGLE-3 draft's directory."""
