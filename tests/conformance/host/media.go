package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"image/png"
	"math"
	"os"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
	"google.golang.org/grpc/codes"
)

const (
	imageModel      = "tiny-image"
	transcribeModel = "tiny-transcribe"
	speakModel      = "tiny-speak"

	imageWidth, imageHeight = 64, 128
	pcmRate                 = 16000
	// A piece of live audio: a tenth of a second.
	pieceSamples = pcmRate / 10
)

// allServices calls each of the eight services of a plugin that has them all.
func allServices(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("GetManifest", s.getManifest)
	simple(r, "StartEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "cpu"})
	})
	for _, model := range []string{chatModel, embedModel, rerankModel, imageModel, transcribeModel, speakModel} {
		r.check("PullModelStream "+model, func() (string, error) { return s.pullStream(model) })
	}
	r.check("chat", func() (string, error) { return s.chat(16) })
	r.check("text of the chat answer", s.counts)
	r.check("chat stream", s.chatStream)
	r.check("generate", s.generate)
	r.check("embed", s.embed)
	r.check("rerank", s.rerank)
	r.check("text-to-image", s.picture)
	var speech []byte
	r.check("text-to-speech", func() (detail string, err error) { speech, detail, err = s.speak(); return })
	r.check("speech-to-text", func() (string, error) { return s.transcribe(speech) })
	r.check("speech-to-text-ws", s.live)
	r.check("speech-to-text-ws, run-task and half-close", s.liveHalfClosed)
	s.wrongMedia(r)
	r.check("cancelled image generation", s.cancelPictures)
	r.check("an image right after the cancelled one", func() (string, error) { return quick(s.picture) })
	r.check("a call right after the abandoned one", s.quickly)
	simple(r, "StopEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StopEngine(ctx, &protocol.StopEngineRequest{})
	})
	r.check("Kill", s.kill)
	r.check("no error in the host's log", s.noErrors)
}

func pictureRequest(steps int) object {
	return object{
		"model":               imageModel,
		"prompt":              "a cat on the moon",
		"size":                fmt.Sprintf("%dx%d", imageWidth, imageHeight),
		"num_inference_steps": steps,
		"rng_seed":            1,
	}
}

// counts asks for what the tiny chat model was taught.
func (s *session) counts() (string, error) {
	const want = "one two three four five six seven eight nine ten"
	ctx, cancel := bounded()
	defer cancel()
	request := chatRequest(64)
	request["messages"] = []object{{"role": "user", "content": "count"}}
	data, err := s.invoke(ctx, "chat", request)
	if err != nil {
		return "", err
	}
	answer, err := decode[completionJSON](data)
	if err != nil {
		return "", err
	}
	if len(answer.Choices) != 1 || strings.TrimSpace(answer.Choices[0].Message.Content) != want {
		return "", fmt.Errorf("not %q: %s", want, clip(string(data)))
	}
	return want, nil
}

// longPicture takes many seconds.
func longPicture() object {
	request := pictureRequest(100)
	request["size"] = "512x512"
	return request
}

// picture decodes the PNG that comes and looks at its size.
func (s *session) picture() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data, err := s.invoke(ctx, "text-to-image", pictureRequest(2))
	if err != nil {
		return "", err
	}
	answer, err := decode[imagesJSON](data)
	if err != nil {
		return "", err
	}
	if len(answer.Data) != 1 || answer.Created == 0 {
		return "", fmt.Errorf("not one picture, or made at no time: %s", clip(string(data)))
	}
	file, err := base64.StdEncoding.DecodeString(answer.Data[0].B64JSON)
	if err != nil {
		return "", err
	}
	decoded, err := png.Decode(bytes.NewReader(file))
	if err != nil {
		return "", err
	}
	if size := decoded.Bounds().Size(); size.X != imageWidth || size.Y != imageHeight {
		return "", fmt.Errorf("%d×%d, not %d×%d", size.X, size.Y, imageWidth, imageHeight)
	}
	return fmt.Sprintf("a PNG of %d×%d, %d bytes", imageWidth, imageHeight, len(file)), nil
}

// speak reads the WAV that comes, which is a file of this machine and in the answer as well.
func (s *session) speak() ([]byte, string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data, err := s.invoke(ctx, "text-to-speech", object{"model": speakModel, "text": "Hello."})
	if err != nil {
		return nil, "", err
	}
	answer, err := decode[speechJSON](data)
	if err != nil {
		return nil, "", err
	}
	file, err := os.ReadFile(answer.URL)
	if err != nil {
		return nil, "", err
	}
	if sent, err := base64.StdEncoding.DecodeString(answer.Audio); err != nil || !bytes.Equal(sent, file) {
		return nil, "", fmt.Errorf("audio is not the file at url (%v)", err)
	}
	rate, seconds, err := parseWAV(file)
	if err != nil {
		return nil, "", err
	}
	if answer.Format != "wav" || answer.SampleRate != rate || math.Abs(answer.Duration-seconds) > 0.01 {
		return nil, "", fmt.Errorf("%q, %d Hz, %g s; the file has %d Hz, %g s", answer.Format, answer.SampleRate,
			answer.Duration, rate, seconds)
	}
	return file, fmt.Sprintf("%.2f s at %d Hz", seconds, rate), nil
}

// parseWAV returns the sample rate and the seconds of a WAV file of PCM.
func parseWAV(file []byte) (rate int, seconds float64, err error) {
	if len(file) < 12 || string(file[:4]) != "RIFF" || string(file[8:12]) != "WAVE" {
		return 0, 0, errors.New("not a WAV file")
	}
	if size := binary.LittleEndian.Uint32(file[4:]); int(size) != len(file)-8 {
		return 0, 0, fmt.Errorf("RIFF says %d bytes, there are %d", size, len(file)-8)
	}
	bytesPerSecond := 0
	for rest := file[12:]; len(rest) >= 8; {
		name, size := string(rest[:4]), int(binary.LittleEndian.Uint32(rest[4:]))
		rest = rest[8:]
		if size > len(rest) {
			return 0, 0, fmt.Errorf("%q is longer than the file", name)
		}
		switch {
		case name == "fmt " && size >= 16:
			rate = int(binary.LittleEndian.Uint32(rest[4:]))
			bytesPerSecond = int(binary.LittleEndian.Uint32(rest[8:]))
		case name == "data" && bytesPerSecond > 0 && size > 0:
			return rate, float64(size) / float64(bytesPerSecond), nil
		}
		rest = rest[size+size%2:]
	}
	return 0, 0, errors.New("a WAV file without sound")
}

// transcribe sends what was spoken. The model's weights are random: what it hears is not looked at.
func (s *session) transcribe(speech []byte) (string, error) {
	if speech == nil {
		return "", errors.New("nothing was spoken")
	}
	ctx, cancel := bounded()
	defer cancel()
	request := object{"model": transcribeModel, "audio": base64.StdEncoding.EncodeToString(speech)}
	data, err := s.invoke(ctx, "speech-to-text", request)
	if err != nil {
		return "", err
	}
	answer, err := decode[transcriptionJSON](data)
	if err != nil {
		return "", err
	}
	if answer.Model != transcribeModel || answer.Text == nil || answer.Segments == nil {
		return "", fmt.Errorf("no model, text or segments in %s", clip(string(data)))
	}
	for index, segment := range answer.Segments {
		if segment.ID != index || segment.End < segment.Start {
			return "", fmt.Errorf("a wrong segment: %s", clip(string(data)))
		}
	}
	return fmt.Sprintf("%d segments, %q", len(answer.Segments), clip(*answer.Text)), nil
}

// voice is seconds of 16-bit PCM: a tone that swells and falls as syllables do.
func voice(seconds float64) []byte {
	samples := make([]byte, 0, int(seconds*pcmRate)*2)
	for i := range int(seconds * pcmRate) {
		at := float64(i) / pcmRate
		swell := math.Pow(math.Sin(2*math.Pi*2*at), 2)
		level := swell * (0.5*math.Sin(2*math.Pi*150*at) + 0.3*math.Sin(2*math.Pi*450*at) + 0.2*math.Sin(2*math.Pi*1200*at))
		samples = binary.LittleEndian.AppendUint16(samples, uint16(int16(level*20000)))
	}
	return samples
}

// wavOf is samples of voice as a WAV file.
func wavOf(samples []byte) []byte {
	file := []byte("RIFF\x00\x00\x00\x00WAVEfmt ")
	binary.LittleEndian.PutUint32(file[4:], uint32(len(samples)+36))
	for _, field := range []any{
		uint32(16), uint16(1), uint16(1), uint32(pcmRate), uint32(2 * pcmRate), uint16(2), uint16(16),
	} {
		file, _ = binary.Append(file, binary.LittleEndian, field)
	}
	file = append(file, "data"...)
	return append(binary.LittleEndian.AppendUint32(file, uint32(len(samples))), samples...)
}

func liveMetadata(model string) map[string]string {
	return map[string]string{"model": model, "language": "en", "format": "pcm", "sample_rate": fmt.Sprint(pcmRate)}
}

// sendPieces sends audio as it would come from a microphone that is in a hurry.
func sendPieces(stream protocol.ProviderService_InvokeServiceBidiClient, samples []byte, first bool) error {
	for len(samples) > 0 {
		size := min(len(samples), 2*pieceSamples)
		message := &protocol.InvokeServiceBidiRequest{
			ServiceName: "speech-to-text-ws", Data: samples[:size], MessageType: "binary", IsFirst: first,
		}
		if first {
			message.Metadata = liveMetadata(transcribeModel)
		}
		if err := stream.Send(message); err != nil {
			return err
		}
		samples, first = samples[size:], false
	}
	return nil
}

func sendText(stream protocol.ProviderService_InvokeServiceBidiClient, text object, first bool, model string) error {
	message := &protocol.InvokeServiceBidiRequest{
		ServiceName: "speech-to-text-ws", Data: encode(text), MessageType: "text", IsFirst: first,
	}
	if first {
		message.Metadata = liveMetadata(model)
	}
	return stream.Send(message)
}

// live is AOG's way: binary messages, the first with metadata, and finish-task at the end.
func (s *session) live() (string, error) {
	return s.converse(func(stream protocol.ProviderService_InvokeServiceBidiClient) error {
		if err := sendPieces(stream, voice(2), true); err != nil {
			return err
		}
		if err := sendText(stream, object{"action": "finish-task"}, false, ""); err != nil {
			return err
		}
		return stream.CloseSend()
	})
}

// liveHalfClosed begins with run-task, and its end is that of the stream.
func (s *session) liveHalfClosed() (string, error) {
	return s.converse(func(stream protocol.ProviderService_InvokeServiceBidiClient) error {
		begin := object{"action": "run-task", "model": transcribeModel, "audio_format": "pcm", "sample_rate": pcmRate}
		if err := sendText(stream, begin, true, transcribeModel); err != nil {
			return err
		}
		if err := sendPieces(stream, voice(1), false); err != nil {
			return err
		}
		return stream.CloseSend()
	})
}

// converse sends and reads a whole conversation, and looks at its events.
func (s *session) converse(send func(protocol.ProviderService_InvokeServiceBidiClient) error) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), unaryTimeout)
	defer cancel()
	stream, err := s.rpc.InvokeServiceBidi(ctx)
	if err != nil {
		return "", err
	}
	sent := make(chan error, 1)
	go func() { sent <- send(stream) }()
	var events []string
	err = each(stream, func(message *protocol.InvokeServiceBidiResponse) error {
		event, err := liveEvent(message)
		events = append(events, event)
		return err
	})
	if err != nil {
		return "", err
	}
	if err := <-sent; err != nil {
		return "", err
	}
	seen := strings.Join(events, " ")
	if len(events) < 2 || events[0] != "task-started" || events[len(events)-1] != "task-finished" {
		return "", fmt.Errorf("not from task-started to task-finished: %s", seen)
	}
	return fmt.Sprintf("%d results", strings.Count(seen, "result-generated")), nil
}

// liveEvent returns a message's event, after a look at what it says.
func liveEvent(message *protocol.InvokeServiceBidiResponse) (string, error) {
	if message.GetMessageType() != "text" {
		return "", fmt.Errorf("a message of type %q", message.GetMessageType())
	}
	answer, err := decode[liveJSON](message.GetData())
	if err != nil {
		return "", err
	}
	if answer.Header.TaskID == "" {
		return "", fmt.Errorf("no task_id in %s", clip(string(message.GetData())))
	}
	if sentence := answer.Payload.Output.Sentence; answer.Header.Event == "result-generated" {
		if sentence.Text == nil || sentence.BeginTime == nil || sentence.EndTime == nil ||
			*sentence.EndTime < *sentence.BeginTime {
			return "", fmt.Errorf("a wrong sentence: %s", clip(string(message.GetData())))
		}
	}
	return answer.Header.Event, nil
}

// wrongMedia sees the code of what cannot be done.
func (s *session) wrongMedia(r *report) {
	wrongKind := chatRequest(8)
	wrongKind["model"] = embedModel
	unknown := pictureRequest(2)
	unknown["model"] = "no-such-model"
	oddSize := pictureRequest(2)
	oddSize["size"] = "large"
	for _, call := range []wrongCall{
		{"a model of another kind", "chat", encode(wrongKind), 400, "model-kind-mismatch"},
		{"a chat model that is to speak", "text-to-speech", encode(object{"model": chatModel, "text": "Hello."}), 400, "model-kind-mismatch"},
		{"an unknown image model", "text-to-image", encode(unknown), 404, "model-missing"},
		{"no size", "text-to-image", encode(oddSize), 400, "request-invalid"},
		{"bad base64", "speech-to-text", encode(object{"model": transcribeModel, "audio": "not base64!"}), 400, "request-invalid"},
		{"no sound", "speech-to-text", encode(object{"model": transcribeModel, "audio": "bm8gc291bmQ="}), 400, "request-invalid"},
		{"nothing to say", "text-to-speech", encode(object{"model": speakModel, "text": ""}), 400, "request-invalid"},
	} {
		r.check(call.name, func() (string, error) {
			return s.wrongInvocation(call)
		})
	}
	r.check("a conversation with a model of another kind", s.wrongConversation)
}

// wrongConversation gets its error in the answers, before or after task-started.
func (s *session) wrongConversation() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	stream, err := s.rpc.InvokeServiceBidi(ctx)
	if err != nil {
		return "", err
	}
	if err := sendText(stream, object{"action": "run-task"}, true, chatModel); err != nil {
		return "", err
	}
	if err := stream.CloseSend(); err != nil {
		return "", err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return "", fmt.Errorf("no error was told before the end: %w", err)
		}
		if success(answer) != nil {
			return failure(answer, 400)
		}
	}
}

// cancelPictures abandons a picture that is being made and some that wait for their turn.
func (s *session) cancelPictures() (string, error) {
	const many = 3
	ctx, cancel := bounded()
	defer cancel()
	ended := make(chan error, many)
	for range many {
		go func() {
			_, err := s.invoke(ctx, "text-to-image", longPicture())
			ended <- statusIs(err, codes.Canceled)
		}()
	}
	time.AfterFunc(150*time.Millisecond, cancel)
	for range many {
		if err := <-ended; err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d times Canceled", many), nil
}
