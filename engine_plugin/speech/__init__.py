"""Audio and speech, whatever the engine: decoding, voice activity, live transcription, subtitles."""
