package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// The JSON shapes of the wire as an AOG host decodes them: same keys, same Go types.

type manifestJSON struct {
	Version  string `json:"version"`
	Provider struct {
		Name        string `json:"name"`
		DisplayName string `json:"display_name"`
		Version     string `json:"version"`
		Type        string `json:"type"`
		EngineHost  string `json:"engine_host"`
	} `json:"provider"`
	Services []struct {
		ServiceName    string   `json:"service_name"`
		TaskType       string   `json:"task_type"`
		Protocol       string   `json:"protocol"`
		ExposeProtocol string   `json:"expose_protocol"`
		Endpoint       string   `json:"endpoint"`
		AuthType       string   `json:"auth_type"`
		DefaultModel   string   `json:"default_model"`
		SupportModels  []string `json:"support_models"`
		ConfigRef      string   `json:"config_ref"`
		Timeout        int      `json:"timeout"`
		Capabilities   struct {
			SupportStreaming     bool `json:"support_streaming"`
			SupportBidirectional bool `json:"support_bidirectional"`
		} `json:"capabilities"`
	} `json:"services"`
	Platforms map[string]struct {
		Executable   string   `json:"executable"`
		Dependencies []string `json:"dependencies"`
	} `json:"platforms"`
	Resources *struct {
		DataDir string `json:"data_dir"`
	} `json:"resources"`
}

type modelsJSON struct {
	Models []struct {
		Name       string    `json:"name"`
		Model      string    `json:"model"`
		ModifiedAt time.Time `json:"modified_at"`
		Size       int64     `json:"size"`
		Digest     string    `json:"digest"`
		Details    *struct {
			Format            string   `json:"format"`
			Family            string   `json:"family"`
			Families          []string `json:"families"`
			ParameterSize     string   `json:"parameter_size"`
			QuantizationLevel string   `json:"quantization_level"`
		} `json:"details"`
	} `json:"models"`
}

type progressJSON struct {
	Status    string `json:"status"`
	Digest    string `json:"digest"`
	Total     int64  `json:"total"`
	Completed int64  `json:"completed"`
}

type configJSON struct {
	Host           string `json:"host"`
	Origin         string `json:"origin"`
	Scheme         string `json:"scheme"`
	RecommendModel string `json:"recommend_model"`
	DownloadURL    string `json:"download_url"`
	DownloadPath   string `json:"download_path"`
	EnginePath     string `json:"engine_path"`
	ExecPath       string `json:"exec_path"`
	ExecFile       string `json:"exec_file"`
	DeviceType     string `json:"device_type"`
}

type versionJSON struct {
	Version string `json:"version"`
}

type completionJSON struct {
	Object  string `json:"object"`
	Choices []struct {
		Message struct {
			Role    string `json:"role"`
			Content string `json:"content"`
		} `json:"message"`
		Delta struct {
			Content string `json:"content"`
		} `json:"delta"`
		Text         string  `json:"text"`
		FinishReason *string `json:"finish_reason"`
	} `json:"choices"`
	Usage *struct {
		CompletionTokens int `json:"completion_tokens"`
	} `json:"usage"`
}

type embeddingsJSON struct {
	Data []struct {
		Index     int       `json:"index"`
		Embedding []float64 `json:"embedding"`
	} `json:"data"`
}

type rerankJSON struct {
	Results []struct {
		Index          int      `json:"index"`
		RelevanceScore *float64 `json:"relevance_score"`
	} `json:"results"`
}

type imagesJSON struct {
	Created int64 `json:"created"`
	Data    []struct {
		B64JSON string `json:"b64_json"`
	} `json:"data"`
}

type speechJSON struct {
	URL        string  `json:"url"`
	Audio      string  `json:"audio"`
	Format     string  `json:"format"`
	SampleRate int     `json:"sample_rate"`
	Duration   float64 `json:"duration"`
}

type transcriptionJSON struct {
	Text     *string `json:"text"`
	Model    string  `json:"model"`
	Segments []struct {
		ID    int     `json:"id"`
		Start float64 `json:"start"`
		End   float64 `json:"end"`
		Text  string  `json:"text"`
	} `json:"segments"`
}

type liveJSON struct {
	Header struct {
		TaskID string `json:"task_id"`
		Event  string `json:"event"`
	} `json:"header"`
	Payload struct {
		Output struct {
			Sentence struct {
				Text      *string `json:"text"`
				BeginTime *int64  `json:"begin_time"`
				EndTime   *int64  `json:"end_time"`
			} `json:"sentence"`
		} `json:"output"`
	} `json:"payload"`
}

// coded is what most answers have in common.
type coded interface {
	GetCode() int32
	GetMessage() string
}

// success is AOG's IsSuccess.
func success(answer coded) error {
	if code := answer.GetCode(); code != 0 && code != 200 {
		return fmt.Errorf("code %d: %s", code, answer.GetMessage())
	}
	return nil
}

// each reads a stream of answers to its end; each of them must be good, and so must be what use makes of it.
func each[T coded](stream interface{ Recv() (T, error) }, use func(T) error) error {
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := success(answer); err != nil {
			return err
		}
		if err := use(answer); err != nil {
			return err
		}
	}
}

// failure sees that an answer has the code that is wanted, and words for a person.
func failure(answer coded, want int32) (string, error) {
	switch {
	case answer.GetCode() != want:
		return "", fmt.Errorf("code %d, not %d: %s", answer.GetCode(), want, answer.GetMessage())
	case answer.GetMessage() == "":
		return "", fmt.Errorf("code %d without a message", want)
	}
	return fmt.Sprintf("%d: %s", want, answer.GetMessage()), nil
}

func decode[T any](data []byte) (T, error) {
	var value T
	if err := json.Unmarshal(data, &value); err != nil {
		return value, fmt.Errorf("%w in %q", err, clip(string(data)))
	}
	return value, nil
}

func encode(value any) []byte {
	data, err := json.Marshal(value)
	if err != nil {
		panic(err) // only maps of strings, numbers and lists are encoded here
	}
	return data
}

func clip(text string) string {
	if len(text) > 200 {
		return text[:200] + "…"
	}
	return text
}
