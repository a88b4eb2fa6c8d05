package api

import (
	"errors"
	"net/http"
	"strings"
	"testing"
)

// What is wrong with a request is told in JSON's words, and what can be understood in two ways is wrong.
func TestDecodeSaysWhatIsWrong(t *testing.T) {
	const head = `{"forwards":[{"proto":"tcp","containerPort":80,`
	for body, want := range map[string]string{
		"":                                     "the request has no body",
		" \n":                                  "the request has no body",
		`{"publish":["80:80"]`:                 "the JSON ends too early",
		`{"publish":["80:80"]}{}`:              "more than one JSON value",
		`{"publish":["80:80"]}x`:               "more than one JSON value",
		`publish`:                              "no JSON, at octet 1",
		`[]`:                                   "the request is to be an object, not array",
		`{"publish":"80:80"}`:                  `"publish" is to be a list, not string`,
		`{"publish":[80]}`:                     `"publish" is to be a string, not number`,
		`{"forwards":[7]}`:                     `"forwards" is to be an object, not number`,
		head + `"hostPort":-1}]}`:              `"forwards.hostPort" is to be a port, 0 to 65535, not number -1`,
		head + `"hostPort":65536}]}`:           `"forwards.hostPort" is to be a port, 0 to 65535, not number 65536`,
		head + `"hostPort":"80"}]}`:            `"forwards.hostPort" is to be a port, 0 to 65535, not string`,
		head + `"hostPort":1.5}]}`:             `"forwards.hostPort" is to be a port, 0 to 65535, not number 1.5`,
		head + `"host":1}]}`:                   `"forwards.host" is to be a string, not number`,
		head + `"host":"x"}]}`:                 `unable to parse IP`,
		head + `"no":1}]}`:                     `unknown key "no"`,
		head + `"host":"::","host":""}]}`:      `the key "host" comes twice`,
		head + `"hostPort":1,"HOSTPORT":2}]}`:  `the key "HOSTPORT" comes twice`,
		head + `"hostPort":1,"hoſtPort":2}]}`:  `the key "hoſtPort" comes twice`,
		`{"publish":["80:80"],"publish":null}`: `the key "publish" comes twice`,
	} {
		_, err := readAdd(strings.NewReader(body))
		var e *Error
		if !errors.As(err, &e) || e.Status != http.StatusBadRequest || e.Code != CodeBadRequest || !strings.Contains(e.Message, want) {
			t.Errorf("%s: %v, want %q in it", body, err, want)
		} else if strings.Contains(e.Message, "Go ") || strings.Contains(e.Message, "json:") {
			t.Errorf("%s: %q speaks of Go", body, e.Message)
		}
	}
	specs, err := readAdd(strings.NewReader(head + `"hostPort":0},{"proto":"udp","containerPort":81}]}` + "\n"))
	if err != nil || len(specs) != 2 {
		t.Errorf("%v, %v", specs, err)
	}
}
