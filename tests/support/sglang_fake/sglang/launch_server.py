"""The fake server under the real one's name."""

from rollout.sglang_engine.fake import main

if __name__ == "__main__":
    main()
