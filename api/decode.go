package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
)

// decode reads a request's body, one JSON value, into v. Nothing of it may be misunderstood: an unknown key is an error, for
// it may be what keeps a port from being open to all, and so is one that comes twice. Its errors are an *Error, or
// the body's own.
func decode(body io.Reader, v any) error {
	text, err := io.ReadAll(body) // of at most maxBody octets
	if err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			return err
		}
		return badRequest("read the request: %v", err)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return badRequest("the request has no body: it is to be a JSON object")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return badRequest("%s", explainJSON(err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return badRequest("more than one JSON value")
	}
	// It has the form of v now, and so is as deep as that.
	if _, err := decodeOnce(json.NewDecoder(bytes.NewReader(text)), foldKey); err != nil {
		return badRequest("%v: which one is meant?", err)
	}
	return nil
}

// explainJSON puts what the decoder says into words for people who write JSON and no Go.
func explainJSON(err error) string {
	var kind *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "the JSON ends too early"
	case errors.As(err, &syntax):
		return fmt.Sprintf("no JSON, at octet %d: %v", syntax.Offset, err)
	case errors.As(err, &kind):
		name := "the request"
		if kind.Field != "" {
			name = fmt.Sprintf("%q", kind.Field)
		}
		return fmt.Sprintf("%s is to be %s, not %s", name, jsonKind(kind.Type), kind.Value)
	}
	return strings.Replace(strings.TrimPrefix(err.Error(), "json: "), "unknown field", "unknown key", 1)
}

// jsonKind is what JSON has for a Go type of ours.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Uint16:
		return "a port, 0 to 65535"
	case reflect.Int:
		return "a number"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Struct:
		if !reflect.PointerTo(t).Implements(reflect.TypeFor[interface{ UnmarshalText([]byte) error }]()) {
			return "an object"
		}
	}
	return "a string"
}

// foldKey makes one of keys that encoding/json takes for the same: it looks at neither case nor the
// two letters of other alphabets that are an s and a k in upper or lower case.
func foldKey(name string) string { return strings.ToLower(strings.ToUpper(name)) }

// asIs is for those who compare octets.
func asIs(name string) string { return name }

// errTwice is what an object with a key that comes twice is.
type errTwice struct{ key string }

func (e errTwice) Error() string { return fmt.Sprintf("the key %q comes twice", e.key) }

// decodeOnce decodes a value as Decode does, but takes no key twice; fold tells which are the same. It goes as deep as
// the value does.
func decodeOnce(d *json.Decoder, fold func(string) string) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('{'):
		object := map[string]any{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			name := fold(key.(string)) // or else there was an error
			if _, twice := object[name]; twice {
				return nil, errTwice{key.(string)}
			}
			if object[name], err = decodeOnce(d, fold); err != nil {
				return nil, err
			}
		}
		_, err = d.Token()
		return object, err
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := decodeOnce(d, fold)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = d.Token()
		return list, err
	}
	return token, nil
}
