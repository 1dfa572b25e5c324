"""The demo as a Hugging Face Space: this file, its README.md and requirements.txt at the top of the repository."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from fewtokens.demo.__main__ import main

if __name__ == "__main__":
    # A Space is reached through the network of its container; anywhere else, only this machine is.
    host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    sys.argv[1:] = [f"host={host}", f"port={os.environ.get('PORT', '7860')}", *sys.argv[1:]]
    main()
