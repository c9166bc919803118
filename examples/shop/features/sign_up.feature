Feature: Sign up

  Scenario: Who signs up can log in
    When somebody new signs up
    Then the answer is 303
    When they log in
    Then the answer is 303

  Scenario: An address is taken once
    Given the user Ann
    When somebody signs up with the address of Ann
    Then the answer is 409

  Scenario Outline: A bad sign up makes no user
    When somebody signs up as "<address>" with the password "<password>"
    Then the answer is 400
    And there is no such user

    Examples:
      | address               | password                     |
      | no-address-{tag}      | correct horse battery staple |
      | two@at@{tag}          | correct horse battery staple |
      | ok-{tag}@example.test | short                        |
